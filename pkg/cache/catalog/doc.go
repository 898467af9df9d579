// Package catalog is the warmer's memory of what it has warmed, in a Badger
// database beside the volume's files.
//
// The files are the truth; everything here can be made again from them. So the
// database is opened with suspicion, moved aside and rebuilt at the first sign
// of damage, closed before the disk is full, and done without where it cannot
// be had. Only one process can have it open, and builders never do.
package catalog
