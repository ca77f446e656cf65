"""The inner loop in C++ for CPUs, compiled on the machine it runs on."""
