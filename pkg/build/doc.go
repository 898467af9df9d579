// Package build makes container images from Dockerfiles.
//
// A build goes through these phases, each in files of its own:
//
//   - parse.go reads the Dockerfile, stages.go makes the graph of its stages
//     and drops what the target does not need, base.go resolves base images;
//   - dispatch.go turns instructions into changes of the image's config and
//     into steps, the instructions that change files; each instruction has its
//     file, named after it;
//   - solve.go asks the caches for all steps at once, and runs those that are
//     missing, as soon as what they need is there; layer.go is what a step
//     leaves behind;
//   - image.go puts together the image, and export.go brings it where it is
//     wanted.
//
// This is the only package that knows Dockerfile instructions.
package build
