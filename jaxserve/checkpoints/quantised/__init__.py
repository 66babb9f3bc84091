"""Weights that checkpoints hold in few bits, moved into jaxserve's own layouts.

Pure functions of NumPy arrays: what is stored of one tensor in, a weight in one of the formats of
`pallas_kernels.weights` out, any rows of it alone. Its numbers are the stored ones to the last bit.
Bits count scales and minimums too, for groups of 128 where nothing else is said.

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
| AWQ | 4.16 | int4, 128, float32, minimums | 4.5 | a minimum is a zero point times a scale |
| GPTQ, 4 bits, symmetric | 4.16 | int4, 128, float16 | 4.125 | |
| GPTQ, 4 bits | 4.16 | int4, 128, float32, minimums | 4.5 | as AWQ |
| GPTQ, 8 bits, symmetric | 8.19 | int8, 128, float16 | 8.125 | |
| GPTQ, 8 bits | 8.19 | int8, 128, float32, minimums | 8.5 | as AWQ |
| GPTQ, 2 bits | 2.14 | int4, as for 4 bits | 4.125, 4.5 | there is no int2 |
| compressed-tensors, 2, 4, 8 bits | | as GPTQ, or per channel | | as GPTQ |
| float8_e4m3fn | 8 | fp8, per channel or group | 8 | every row has scales of its own |

Weights with GPTQ's activation order are held so where their inputs can be taken in another order,
and dequantised otherwise (`hf_weights`). With scales stored as float32 (rare) a minimum is rounded
to float32 once more than `(code - zero) * scale` is. Zeros may differ in sign from those of other
readers where a format has zero points. What else GGUF has is dequantised (`gguf_file`).
"""
