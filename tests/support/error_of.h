#pragma once

#include <string>

#include "gemma_torch/base/error.h"

/// The message of the Error that `act` throws; "" if it throws none.
template <typename Act>
std::string error_of(Act act) {
  try {
    act();
  } catch (const gemma_torch::Error& error) {
    return error.what();
  }
  return "";
}
