"""Reports from records alone: a DataFrame, tables, figures and paired comparisons."""
