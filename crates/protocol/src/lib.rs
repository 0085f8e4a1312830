//! Words between agentkernel processes.
