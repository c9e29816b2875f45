"""What results.json and metrics.jsonl hold, stated once for those who write and who read them.

`schema` names every field with its type, `read` reads results.json and refuses what does not fit,
for which `consistency` computes figures again from records, and `log` reads metrics.jsonl. The
files may have been cut off, damaged or made up: what is taken from them is then of the right type
and shape, or a line says what is not.
"""
