"""Names as they stand in results."""

OURS, OURS_CUDA = "sbert-fast", "sbert-fast cuda"
REFERENCE, UNPADDED, COMPILED = "sentence-transformers", "st-unpadded", "torch-compile"
PEERS = (REFERENCE, "onnxruntime", "openvino", "zentorch", COMPILED)
PRECISIONS = ("float32", "bfloat16")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Where a row has the ratios of each of ours.
RATIOS = {OURS: "ratios", OURS_CUDA: "ratios_cuda"}
COPY = "copy of as many bytes"
