# find_package(gemma_torch) gives the target gemma_torch::gemma_torch with all that it links: LibTorch (named by
# Torch_DIR or CMAKE_PREFIX_PATH), sentencepiece, nlohmann_json, and MPI if the library was built with it.
include(CMakeFindDependencyMacro)
include(${CMAKE_CURRENT_LIST_DIR}/libraries.cmake)
find_dependency(nlohmann_json 3.10)
if(@MPI_CXX_FOUND@)   # fine-tuning on several machines
  set(MPI_CXX_SKIP_MPICXX ON)
  find_dependency(MPI COMPONENTS CXX)
endif()
include(${CMAKE_CURRENT_LIST_DIR}/gemma_torchTargets.cmake)
