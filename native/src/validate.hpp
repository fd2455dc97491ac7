// Every rule over every byte.
#pragma once

#include "report.hpp"

namespace rmm {

void validate(const uint8_t* data, uint64_t size, Report& report);

}  // namespace rmm
