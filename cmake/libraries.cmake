# What the library links in every build and every project that uses an installed copy: LibTorch and sentencepiece
# as two targets. Included by dependencies.cmake, and by gemma_torchConfig.cmake, beside which it is installed.
if(TARGET gemma_torch::libtorch)
  return()
endif()

# ---- LibTorch: the one that Torch_DIR or CMAKE_PREFIX_PATH names, else a wheel in gemma_torch_torch_hint.
# The wheels hold no libkineto, since it is inside libtorch_cpu, yet their package file warns that it is missing.
# An answer that is linked anyway keeps it from searching.
set(kineto_LIBRARY c10)
# A CUDA build's package file would compile and run a program to ask the GPU what it is. No file here needs the answer.
if(NOT TORCH_CUDA_ARCH_LIST AND NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  set(TORCH_CUDA_ARCH_LIST 8.0)
endif()
find_package(Torch QUIET HINTS ${gemma_torch_torch_hint})
unset(kineto_LIBRARY)
if(NOT Torch_FOUND)
  message(FATAL_ERROR
    "LibTorch not found. Run `bash cmake/run.sh` in gemma_torch, which installs a CPU build into build/venv, or "
    "pass -DCMAKE_PREFIX_PATH=<folder of libtorch> (in Python: torch.utils.cmake_prefix_path).")
endif()
if(TARGET caffe2::mkl)   # names folders of the machine that built the wheel; they would end up in rpaths
  set_property(TARGET caffe2::mkl PROPERTY INTERFACE_LINK_DIRECTORIES "")
endif()
add_library(gemma_torch::libtorch INTERFACE IMPORTED)
target_link_libraries(gemma_torch::libtorch INTERFACE ${TORCH_LIBRARIES})

# ---- OpenMP: at::parallel_for is a header, which compiled without it runs everything on one thread and says nothing
find_package(OpenMP QUIET COMPONENTS CXX)
if(OpenMP_CXX_FOUND AND NOT APPLE)   # by flag, not by path: at run time it is the libgomp that LibTorch brings
  target_compile_options(gemma_torch::libtorch INTERFACE ${OpenMP_CXX_FLAGS})
  target_link_options(gemma_torch::libtorch INTERFACE ${OpenMP_CXX_FLAGS})
elseif(OpenMP_CXX_FOUND)
  target_link_libraries(gemma_torch::libtorch INTERFACE OpenMP::OpenMP_CXX)
else()
  message(WARNING "OpenMP not found for ${CMAKE_CXX_COMPILER}: loops of gemma_torch itself will use one thread.")
endif()

# ---- sentencepiece: most systems ship no CMake package for it
find_path(SENTENCEPIECE_INCLUDE_DIR sentencepiece_processor.h)
find_library(SENTENCEPIECE_LIBRARY sentencepiece)
if(NOT SENTENCEPIECE_INCLUDE_DIR OR NOT SENTENCEPIECE_LIBRARY)
  message(FATAL_ERROR
    "sentencepiece not found. Debian and Ubuntu: apt-get install libsentencepiece-dev. "
    "macOS: brew install sentencepiece.")
endif()
mark_as_advanced(SENTENCEPIECE_INCLUDE_DIR SENTENCEPIECE_LIBRARY)
add_library(gemma_torch::sentencepiece INTERFACE IMPORTED)
target_include_directories(gemma_torch::sentencepiece INTERFACE ${SENTENCEPIECE_INCLUDE_DIR})
target_link_libraries(gemma_torch::sentencepiece INTERFACE ${SENTENCEPIECE_LIBRARY})
