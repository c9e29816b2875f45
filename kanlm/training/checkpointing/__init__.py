"""Checkpoints and exported models: what a run leaves on the disk, in safetensors and JSON.

1. `tensors.py` stores named tensors, whole or sharded, and reads any rows of them.
2. `writer.py` writes `checkpoints/step-N/`, in the background where that is wanted.
3. `reader.py` finds the newest intact one and puts it back into model and optimizer.
4. `export.py` writes `model/`, which `from_pretrained` loads, and reads a run's newest weights.
"""
