// Whether this process may use the tiles of AMX.
#pragma once

namespace sbert_fast::cpu {

/// Asks the kernel for the tiles, for all threads of the process and its children. True where the
/// CPU multiplies bf16 and int8 on them and the kernel keeps their contents; asking again changes
/// nothing.
bool request_amx();

}  // namespace sbert_fast::cpu
