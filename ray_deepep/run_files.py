"""Files in the folder of a training run: the contract between the program that writes them and the report that reads.

| file | what |
|---|---|
| ``config.json`` | the configuration, nested objects of plain values |
| ``metrics.jsonl`` | a line per optimizer step: ``step`` and numbers, times in ms; every other field may be missing |
| ``starts.jsonl`` | a line for each start or resume: ``time_s``, ``step`` (done before it), ``environment`` |
| ``faults.jsonl`` | a line per fault that was found, as in the job log (``Culprit.to_json``) |
| ``checkpoints/step_N/trainer_state.json`` | the seal of a complete checkpoint, with ``step`` and ``files`` |
| ``telemetry/rank_N.jsonl`` | a line per step and rank; fields as in ``step_telemetry`` |
| ``sample.txt`` | text by the model |
"""

from __future__ import annotations

CONFIG = "config.json"
METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
FAULTS = "faults.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_SEAL = "trainer_state.json"
TELEMETRY = "telemetry"
SAMPLE = "sample.txt"
