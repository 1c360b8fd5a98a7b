// What this processor, and the operating system on it, can run.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace sbert_fast::host {

// Every feature the package knows of, on every architecture, with whether it can be used here. A
// feature counts only when the operating system also saves its registers. `amx_*` tells about the
// processor: a process must still ask Linux for permission to use the tiles.
std::vector<std::pair<std::string, bool>> cpu_features();

// The processor's marketing name, or "unknown".
std::string cpu_name();

}  // namespace sbert_fast::host
