#if defined(__x86_64__)
#define SBF_ISA amx_bf16
#define SBF_TILES
#include "kernel_table.h"
#endif
