"""What the records say: a DataFrame, tables, figures and paired comparisons."""
