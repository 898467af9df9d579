// Package warm brings images onto a volume before builders need them: pulled,
// verified and unpacked, so that a build on the node has to ask the registry
// no more than what a tag leads to.
package warm
