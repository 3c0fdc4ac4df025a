"""The folder of a run, its record, its provenance, and its images and videos."""
