// Package snapshot turns trees into layers and layers into trees.
//
// A layer is an immutable set of file changes. It has three shapes, and this
// package converts between them:
//
//   - the tar stream that images carry: [WriteLayer] makes it, [Apply] reads it;
//   - the tree on disk, a directory in overlayfs's upper format, which a
//     kernel can mount as a lower directory: [Apply] makes it, [ScanUpper]
//     reads the one that a command left behind;
//   - the table of contents, a [TOC], which answers questions about a layer
//     without either of the other two.
//
// A [View] is the read-only file system that a stack of layers shows. A
// [Draft] is a View plus changes that exist only in memory, which is how COPY
// and WORKDIR become layers without any root file system.
//
// Nothing here knows images, registries, caches or Dockerfiles.
package snapshot
