"""Statistics: what calibration batches tell about every layer."""
