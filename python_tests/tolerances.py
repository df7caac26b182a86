"""Every tolerance of the suite, with its reason."""

# Two float64 evaluations of one gradient whose sums run in different orders.
PER_SAMPLE_F64 = 1e-9
# A float32 forward and backward against float64: a few hundred roundings of 6e-8, in random directions.
PER_SAMPLE_F32 = 1e-5
# A released float64 gradient against the formula written out: clip, sum, filter, divide.
PRIVATE_STEP_F64 = {"rtol": 1e-9, "atol": 1e-12}
# float32 sums over the same records in another order.
SPLIT_F32 = 1e-5
# One linear layer or a small model in float64, two orders of summation.
LAYER_F64 = {"rtol": 1e-10, "atol": 1e-12}
# One layer in float32: sums of under 100 products of order 1.
LAYER_F32 = {"rtol": 1e-5, "atol": 1e-5}
# SPEC: evaluation equals merged weights to 1e-5.
MERGED_F32 = {"rtol": 1e-5, "atol": 1e-5}
# Norm of the error of a chain of three bfloat16 products, relative: a few roundings of 2^-9 each.
BFLOAT16 = 1.5e-2
# Loss and gradients of a two-layer model in float32, two orders of summation in every layer.
MODEL_F32 = {"rtol": 1e-4, "atol": 1e-5}
