// Package sandbox runs one process in one root file system, as isolated from
// the builder as the machine permits.
//
// It needs no container runtime: the program that uses it executes itself
// again as the init process of the new namespaces, so its main function must
// call [Init] before anything else. All mounts are made in the new mount
// namespace and end with it, whatever kills whom.
package sandbox
