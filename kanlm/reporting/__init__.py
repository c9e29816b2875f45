"""results.json and metrics.jsonl → tables, figures and one self-contained page.

Reads JSON, and imports of the rest of kanlm only how files are read, checked and written, so
that a report can be made anew wherever the folder lies.
"""
