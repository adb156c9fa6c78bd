"""What a fork server imports last: its forks then share the pages of all objects that it has. A collection in a fork
would look at each of them, and write to each, so that the kernel copies its page."""

import gc

from elastic.garbage import freeze_imported

gc.collect()
freeze_imported()
