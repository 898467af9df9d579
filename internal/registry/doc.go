// Package registry talks to container registries: transport, credentials,
// retries, resuming pulls and parallel pushes. It also reads and writes images
// as OCI layouts and docker archives, the forms that images have off-line.
//
// It knows manifests and blobs, not images' meaning: what to pull and what to
// make of it is decided elsewhere.
package registry
