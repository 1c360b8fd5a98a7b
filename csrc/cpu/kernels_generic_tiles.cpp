// For tests: the code that runs on tiles, on a CPU without them.
#define SBF_ISA generic_tiles
#define SBF_TILES
#define SBF_PORTABLE_TILES
#include "kernel_table.h"
