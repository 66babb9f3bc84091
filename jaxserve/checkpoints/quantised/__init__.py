"""Weights that checkpoints hold in few bits, moved into jaxserve's own layouts.

Pure functions of NumPy arrays: what is stored of one tensor in, a weight in one of the formats of
`pallas_kernels.weights` out, any rows of it alone. Its numbers are the stored ones to the last bit.
Bits count scales and minimums too.

| Stored | Bits stored | Format | Bits held | Why more |
|---|---|---|---|---|
| GGUF Q8_0 | 8.5 | int8, 32, float16 | 8.5 | |
| GGUF Q4_0 | 4.5 | int4, 32, float16 | 4.5 | |
| GGUF Q4_1 | 5 | int4, 32, float16, minimums | 5 | |
| GGUF Q5_0 | 5.5 | int5, 32, float16 | 5.5 | |
| GGUF Q5_1 | 6 | int5, 32, float16, minimums | 6 | |
| GGUF Q4_K | 4.5 | int4, 32, float32, minimums | 6 | a scale is a product of 17 bits |
| GGUF Q5_K | 5.5 | int5, 32, float32, minimums | 7 | a scale is a product of 17 bits |
| GGUF Q6_K | 6.5625 | int6, 16, float32 | 8 | a scale is a product of 19 bits |

Everything else that GGUF has is dequantised (`gguf_file`).
"""
