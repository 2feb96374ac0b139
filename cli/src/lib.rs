//! The command lines of `sdfast` and `sdconv`: arguments, progress, messages, exit codes.
