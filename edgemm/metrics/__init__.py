"""Metrics, one a file. Each has UNIT, OUTPUTS (the kinds of outputs that it can judge, see parity.kind_of) and

    values(outputs, reference, targets) -> float64[n]   one value a sample, higher is better

outputs, reference  Outputs of the model judged, and of the FP32 model that the user brought: see below
targets             [n] what is right: str, or None where the data does not say

A metric may have, too:
    ERROR = True      reports 1 - mean: an error rate such as WER, whose `values` are 1 - errors of the sample
    NEEDS_TARGETS = False    can do without: judges agreement with FP32, or pairs that belong together

Outputs is a dict by output kind:
    labels      {"logits": float32[n,A], "labels": str[A]}
    embeddings  {"image": float32[n,D], "text": float32[n,D]} (or audio); row i of both is a pair that belongs together
    generation, transcript  {"text": str[n]}
    picture     {"text": str[n], "picture": uint8[n,H,W,3]}, RGB; the text is the ids of its plan as words
    features    {tensor name: float32[n, ...]}, shorter ones padded with zeros
"""
