"""results.json and metrics.jsonl → tables, figures and one self-contained page.

Reads JSON and imports nothing else of kanlm, so that a report can be made anew wherever
the folder lies.
"""
