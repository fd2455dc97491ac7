// Every rule over every byte.
#pragma once

#include "index.hpp"

namespace rmm {

// `index` has bytes and the copy of their header; nothing of it needs to have been read.
void validate(Index& index, Report& report);

}  // namespace rmm
