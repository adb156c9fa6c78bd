"""A sweep over the options of a job, as `elastic sweep` does it.

python -m jobs.sweep --job jobs.digits --search "job.lr=loguniform(1e-4,1e-1)" --search "job.width=choice(8,16,32)" \
    --trials 20 --scheduler asha --metric eval/accuracy --mode max --scaling.max-workers 1
"""

from elastic.sweep.command import main

if __name__ == "__main__":
    main()
