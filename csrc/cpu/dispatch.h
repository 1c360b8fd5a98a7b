// Which instruction set the kernels run on.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace sbert_fast::cpu {

/// Kernels of the active instruction set: the best one of this CPU unless select_isa() chose
/// another.
const KernelTable& kernels();

/// Names of the instruction sets that this CPU runs, best first; "generic" is always the last.
std::vector<std::string> available_isas();

/// Makes `isa` the active one for the whole process; false where this CPU does not run it. Every
/// CPU also runs "generic_tiles", which is slow: "generic" with the code for tiles, for tests.
bool select_isa(const std::string& isa);

}  // namespace sbert_fast::cpu
