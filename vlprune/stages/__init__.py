"""The stages of a run: statistics, masks, tuned weights, predictions, record."""
