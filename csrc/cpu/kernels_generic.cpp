#define SBF_ISA generic
#include "kernel_table.h"
