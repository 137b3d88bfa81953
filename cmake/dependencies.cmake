# Finds what the library is built on. System packages first; FetchContent only where one is missing.
include(FetchContent)

# ---- LibTorch. CMAKE_PREFIX_PATH or Torch_DIR name one; else the wheel that cmake/run.sh put into build/venv.
if(NOT Torch_DIR AND NOT CMAKE_PREFIX_PATH AND NOT DEFINED ENV{CMAKE_PREFIX_PATH} AND NOT DEFINED ENV{Torch_DIR})
  file(GLOB venv_torch ${CMAKE_CURRENT_SOURCE_DIR}/build/venv/lib/python3*/site-packages/torch)
  if(venv_torch)
    list(APPEND CMAKE_PREFIX_PATH ${venv_torch})
  endif()
endif()
if(NOT kineto_LIBRARY)
  set(kineto_LIBRARY kineto_LIBRARY-NOTFOUND CACHE FILEPATH "" FORCE)
endif()
find_package(Torch QUIET)
if(NOT Torch_FOUND)
  message(FATAL_ERROR
    "LibTorch not found. Run `bash cmake/run.sh`, which installs a CPU build into build/venv, or pass "
    "-DCMAKE_PREFIX_PATH=<folder of libtorch> (in Python: torch.utils.cmake_prefix_path).")
endif()
if(TARGET caffe2::mkl)   # names folders of the machine that built the wheel
  set_property(TARGET caffe2::mkl PROPERTY INTERFACE_LINK_DIRECTORIES "")
endif()
add_library(gemma_torch_libtorch INTERFACE)
target_link_libraries(gemma_torch_libtorch INTERFACE ${TORCH_LIBRARIES})

# ---- sentencepiece (no CMake package in most systems)
find_path(SENTENCEPIECE_INCLUDE_DIR sentencepiece_processor.h)
find_library(SENTENCEPIECE_LIBRARY sentencepiece)
if(NOT SENTENCEPIECE_INCLUDE_DIR OR NOT SENTENCEPIECE_LIBRARY)
  message(FATAL_ERROR "sentencepiece not found. Debian, Ubuntu: apt-get install libsentencepiece-dev. macOS: brew install sentencepiece")
endif()
add_library(gemma_torch_sentencepiece INTERFACE)
target_include_directories(gemma_torch_sentencepiece SYSTEM INTERFACE ${SENTENCEPIECE_INCLUDE_DIR})
target_link_libraries(gemma_torch_sentencepiece INTERFACE ${SENTENCEPIECE_LIBRARY})

find_package(nlohmann_json 3.10 REQUIRED)
if(GEMMA_TORCH_APPS)
  find_package(CLI11 2.1 REQUIRED)
endif()
if(GEMMA_TORCH_TESTS)
  find_package(Catch2 REQUIRED)
endif()
