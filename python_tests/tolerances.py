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
# Guarantee: evaluation equals merged weights to 1e-5.
MERGED_F32 = {"rtol": 1e-5, "atol": 1e-5}
# Norm of the error of a chain of three bfloat16 products, relative: a few roundings of 2^-9 each.
BFLOAT16 = 1.5e-2
# Loss and gradients of a two-layer model in float32, two orders of summation in every layer.
MODEL_F32 = {"rtol": 1e-4, "atol": 1e-5}
# float32 kernels against float64: norm of the error over the norm of the result; sums of up to 3,000 products in
# blocks of at most 64 or W lanes (measured: 3e-7).
KERNEL_F32 = 1e-6
# ... of a squared norm: twice the relative error of the vector.
KERNEL_SQ = 2e-6
# One rounding to bfloat16, at most 2^-9 relative each.
BFLOAT16_ROUNDED = 2.0**-8
# Guarantee: the vector logarithm and sine give normals to 1e-6 absolute against float64.
NORMAL_F32 = 1e-6
# Guarantee: the sensitivity holds to 1e-5 in float32.
SENSITIVITY_F32 = 1e-5
# Statistics of a fixed stream: KS test that must accept, and ones that must reject.
KS_ACCEPT, KS_REJECT = 1e-2, 1e-9
# Probability with which a statistical test on fixed draws may raise a false alarm; its negative control falls below.
FALSE_ALARM = 1e-6
# Issue: ε equals Opacus' PRV accountant within 1%; that one is asked for 0.2%.
EPSILON_PRV = 0.01
# A grid of 1/16 of the loss' standard deviation adds (1/16)^2/8 to its variance's root; three times that.
EPSILON_GRID = 1.5e-3
# A float32 image: one division by 255 and one normalisation by a deviation of 0.2.
BATCH_F32 = {"rtol": 1e-5, "atol": 1e-6}
# Mean brightness of an enlarged image: a bicubic filter keeps it but for what the border and the clamp to [0, 1] cut.
RESIZED_MEAN = {"rtol": 0.05, "atol": 0.0}
# Of 255: Pillow's resize rounds to whole numbers between its passes along the two axes (a half, times the bicubic
# filter's sum of absolute weights, below 1.3), and at the end (another half).
RESIZED_U8 = 1.15
# Two rounds of three float32 steps of a two-layer model against plain autograd, one record at a time; moves are ~0.1.
ROUNDS_F32 = {"rtol": 1e-3, "atol": 2e-6}
# A compiled float32 graph fuses and reorders what eager rounds in between.
COMPILED_F32 = 1e-5
# Norm of a released gradient's error under autocast: a handful of products with 8 (bfloat16) or 11 (float16) bits.
AUTOCAST_BF16 = 3e-2
AUTOCAST_F16 = 5e-3
# One rounding to float16, at most 2^-11 relative each, of values above its subnormals.
FLOAT16_ROUNDED = 2.0**-10
# Triton's interpreter cuts bfloat16 off where a card rounds: at most 2^-7 relative.
BFLOAT16_CUT = 2.0**-7
# A gradient whose float32 factor entered the matrix units as the sum of two bfloat16: 2^-16 relative where the halves
# are cut off (the interpreter), 2^-18 where they are rounded; errors add up at random. Measured: 1e-5 and 3e-6.
GRADIENT_OF_HALVES = 2.0**-16
# Guarantee: the same normals to 1e-5 on every backend. Measured: 5e-7.
NORMAL_GPU = 1e-5
