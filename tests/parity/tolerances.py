"""How near is "the same": the one table. To loosen a number needs an ADR.

Absolute, unless the name says relative. Float32 throughout, but for the last group.
"""

# Against Meta's own code, in float32.
META_LOGITS = 1e-4
META_LOSS = 1e-5
META_HIDDEN = 1e-4
META_GRADIENT_RELATIVE = 1e-4

# Against the NumPy model of tests/reference, which computes in float64.
NUMPY_LOGITS = 1e-4

# The same sums in another order: on another mesh, in parts, through a cache.
ORDER_LOGITS = 1e-5
# ... and of their size, where two programs multiply in forms of their own (ADR 11).
ORDER_RELATIVE = 5e-6
ORDER_LOSS = 5e-6
ORDER_GRADIENT_RELATIVE = 2e-5
ORDER_PARAMS_RELATIVE = 1e-4

# Bfloat16 against float32, as a multiple of the difference that Meta's code shows.
BFLOAT16_MULTIPLE = 1.5

# The splash kernel in bfloat16 against float32, relative to the largest value: two
# roundings of a number with 8 bits.
SPLASH_BFLOAT16_RELATIVE = 2**-7

# A model of random weights with keys and values, or matrices, in eight bits.
INT8_LOGITS = 0.25
INT8_LOSS = 0.02
