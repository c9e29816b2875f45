"""results.json and metrics.jsonl → tables, figures and one self-contained page.

Reads JSON, and imports of the rest of kanlm only what results hold and how files are written, so
that a report can be made anew wherever the folder lies.
"""
