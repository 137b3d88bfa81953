# Finds what the library is built on. The system's packages come first; header libraries that it lacks are fetched.
include(FetchContent)

file(GLOB gemma_torch_torch_hint ${PROJECT_SOURCE_DIR}/build/venv/lib/python3*/site-packages/torch)
include(cmake/libraries.cmake)

# Uses the package when the system has it, else fetches this tag of it.
macro(find_or_fetch package version repository tag)
  find_package(${package} ${version} QUIET)
  if(NOT ${package}_FOUND)
    message(STATUS "${package} ${version} is not installed: fetching ${tag}")
    string(TOLOWER ${package} fetched)
    FetchContent_Declare(${fetched} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON)
    FetchContent_MakeAvailable(${fetched})
  endif()
endmacro()

set(JSON_Install ON)   # a fetched copy is installed with the library, whose headers include it
find_or_fetch(nlohmann_json 3.10 https://github.com/nlohmann/json.git v3.11.3)
if(GEMMA_TORCH_APPS)
  find_or_fetch(CLI11 2.1 https://github.com/CLIUtils/CLI11.git v2.4.2)
endif()
if(GEMMA_TORCH_TESTS)
  find_or_fetch(Catch2 2.13 https://github.com/catchorg/Catch2.git v3.7.1)
endif()

# MPI's functions in C alone, for gemma_torch/adapt/ranks_mpi.cpp.
if(NOT GEMMA_TORCH_MPI MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "GEMMA_TORCH_MPI: expected AUTO, ON or OFF, got ${GEMMA_TORCH_MPI}")
endif()
set(MPI_CXX_FOUND FALSE)
if(NOT GEMMA_TORCH_MPI STREQUAL OFF)
  set(MPI_CXX_SKIP_MPICXX ON)
  find_package(MPI QUIET COMPONENTS CXX)
  if(NOT MPI_CXX_FOUND AND GEMMA_TORCH_MPI STREQUAL ON)
    message(FATAL_ERROR "MPI not found, and GEMMA_TORCH_MPI is ON. Debian and Ubuntu: apt-get install libopenmpi-dev "
                        "openmpi-bin. macOS: brew install open-mpi.")
  endif()
endif()

if(NOT PROJECT_IS_TOP_LEVEL)   # a project that adds this one as a folder must see what the library links
  get_property(imported DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS imported)
    set_property(TARGET ${target} PROPERTY IMPORTED_GLOBAL TRUE)
  endforeach()
endif()
