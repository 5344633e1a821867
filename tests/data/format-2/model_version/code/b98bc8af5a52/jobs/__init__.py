"""One folder per job: values in job.yaml, model code beside it."""
