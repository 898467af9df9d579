package snapshot

import (
	"encoding/binary"
	"maps"
	"slices"
)

// Extended attributes are encoded as a sequence of name and value, each with
// its length as uint32 before it, sorted by name.

func xattrsSize(m map[string]string) int {
	n := 0
	for k, v := range m {
		n += 8 + len(k) + len(v)
	}
	return n
}

func appendXattrs(b []byte, m map[string]string) []byte {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		for _, s := range [...]string{k, m[k]} {
			b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
			b = append(b, s...)
		}
	}
	return b
}

// decodeXattrs is the inverse of appendXattrs. It ignores what is cut off: the
// table's checksum has been verified, so only a foreign writer can cause that.
func decodeXattrs(s string) map[string]string {
	if s == "" {
		return nil
	}
	m := map[string]string{}
	next := func() (string, bool) {
		if len(s) < 4 {
			return "", false
		}
		n := int(binary.LittleEndian.Uint32([]byte(s[:4])))
		if n > len(s)-4 {
			return "", false
		}
		v := s[4 : 4+n]
		s = s[4+n:]
		return v, true
	}
	for {
		k, ok := next()
		if !ok {
			return m
		}
		v, ok := next()
		if !ok {
			return m
		}
		m[k] = v
	}
}
