// Package cache remembers what build steps have produced.
//
// A [Key] is the hash of everything that decides a step's output; an [Entry]
// says what came out. Tables map keys to entries: the ones that a [Disk] holds
// and the ones that a [Remote] repository holds, behind the same interface.
// The content itself, blobs and unpacked trees of layers, lies in the Disk,
// the volume that all builders and the warmer of a node share.
//
// Three rules hold everywhere. A key is not its content: entries are
// statements, content is verified against its digest. A miss is not a failure,
// and damage is a miss. And a final name always holds complete bytes.
//
// The volume's layout and the formats are in docs/cache-format.md.
package cache
