package snapshot

import (
	"encoding/binary"
	"hash/crc32"
)

// WithChecksum returns data with its last four bytes replaced by the checksum
// that DecodeTOC wants.
func WithChecksum(data []byte) []byte {
	if len(data) < 4 {
		return data
	}
	body := data[: len(data)-4 : len(data)-4]
	return binary.LittleEndian.AppendUint32(body, crc32.Checksum(body, castagnoli))
}
