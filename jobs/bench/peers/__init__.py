"""Other trainers that survive faults, measured beside this one: stock Ray Train, torchrun and torchft."""
