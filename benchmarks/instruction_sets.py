"""AVX2 means AVX2 for everybody: torch, its matrix products and what it compiles.

To be imported before anything is computed: each reads its variable once.
"""

import os

if os.environ.get("SEGKERNELS_ISA") == "avx2":
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
