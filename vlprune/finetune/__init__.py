"""Fine-tuning under the masks."""
