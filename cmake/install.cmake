# `cmake --install`, and the package that find_package(gemma_torch) reads in other projects.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/gemma_torch)
set(package_version_file ${PROJECT_BINARY_DIR}/gemma_torchConfigVersion.cmake)
write_basic_package_version_file(${package_version_file} COMPATIBILITY SameMinorVersion)

# The component `library` is all that other projects need; tests/consumer installs it alone.
install(TARGETS gemma_torch EXPORT gemma_torchTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library)
install(EXPORT gemma_torchTargets NAMESPACE gemma_torch:: DESTINATION ${package_dir} COMPONENT library)
install(FILES cmake/gemma_torchConfig.cmake cmake/libraries.cmake ${package_version_file}
        DESTINATION ${package_dir} COMPONENT library)
install(DIRECTORY gemma_torch DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT library
        FILES_MATCHING PATTERN "*.h")
install(FILES gemma_torch/text/minloglevel.cpp DESTINATION ${CMAKE_INSTALL_DATADIR}/gemma_torch
        COMPONENT library)

if(GEMMA_TORCH_APPS)
  # The LibTorch it was linked with; CMake itself leaves out folders inside the project, such as build/venv.
  set_property(TARGET gemma PROPERTY INSTALL_RPATH ${TORCH_INSTALL_PREFIX}/lib)
  install(TARGETS gemma RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT program)
endif()
