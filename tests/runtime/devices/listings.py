"""What `llama-server --list-devices` prints, both outputs together, on several machines."""

CUDA_TWO = """\
ggml_cuda_init: found 2 CUDA devices (Total VRAM: 286310 MiB):
  Device 0: NVIDIA H200, compute capability 9.0, VMM: yes, VRAM: 143155 MiB
  Device 1: NVIDIA H200, compute capability 9.0, VMM: yes, VRAM: 143155 MiB
Available devices:
  CUDA0: NVIDIA H200 (143155 MiB, 142627 MiB free)
  CUDA1: NVIDIA H200 (143155 MiB, 142627 MiB free)
"""

CUDA_OLDER = """\
ggml_cuda_init: GGML_CUDA_FORCE_MMQ:    no
ggml_cuda_init: GGML_CUDA_FORCE_CUBLAS: no
ggml_cuda_init: found 1 CUDA devices:
  Device 0: NVIDIA GB10, compute capability 12.1, VMM: yes
Available devices:
  CUDA0: NVIDIA GB10 (122570 MiB, 115218 MiB free)
"""

CUDA_FAILED = """\
ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected
Available devices:
  (none)
"""

ROCM = """\
ggml_cuda_init: found 1 ROCm devices (Total VRAM: 24560 MiB):
  Device 0: AMD Radeon RX 7900 XTX, gfx1100 (0x1100), VMM: no, Wave Size: 32, VRAM: 24560 MiB
Available devices:
  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24512 MiB free)
"""

VULKAN = """\
Available devices:
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 23904 MiB free)
  Vulkan1: Intel(R) Arc(tm) A770 Graphics (DG2) (16032 MiB, 14429 MiB free)
  Vulkan2: NVIDIA GeForce RTX 4090 (24564 MiB, 23592 MiB free)
"""

CPU = """\
Available devices:
  (none)
"""

BLAS = """\
Available devices:
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
"""
