# find_package(gemma_torch) gives the target gemma_torch::gemma_torch with all that it links: LibTorch (named by
# Torch_DIR or CMAKE_PREFIX_PATH), sentencepiece, nlohmann_json.
include(CMakeFindDependencyMacro)
include(${CMAKE_CURRENT_LIST_DIR}/libraries.cmake)
find_dependency(nlohmann_json 3.10)
include(${CMAKE_CURRENT_LIST_DIR}/gemma_torchTargets.cmake)
