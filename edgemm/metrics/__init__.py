"""Metrics, one a file. Each has UNIT and

    values(outputs, reference, labels) -> float64[n]   one value a sample, higher is better

outputs, reference   float32[n,A]: of the model judged, and of the FP32 model that the user brought
labels               int64[n]: index of the right answer
"""
