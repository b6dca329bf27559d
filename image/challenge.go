package image

import (
	"net/http"
	"strings"
)

// challenge is what a registry wants to see: "Basic" or "Bearer".
type challenge struct {
	scheme string            // lower case
	params map[string]string // keys in lower case: realm, service, scope, error
}

// parseChallenges reads the WWW-Authenticate headers, for example
//
//	Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull", Basic realm="x"
//
// Several challenges may share a header, separated by the commas that also
// separate parameters. What makes no sense is skipped.
func parseChallenges(h http.Header) []challenge {
	var all []challenge
	for _, s := range h.Values("Www-Authenticate") {
		if len(s) > 8<<10 {
			continue
		}
		for s = skipList(s); s != ""; s = skipList(s) {
			word, rest := token(s)
			if word == "" { // not a token: drop a byte, look on
				s = s[1:]
				continue
			}
			if value, after, ok := parameter(rest); ok {
				if len(all) > 0 {
					all[len(all)-1].params[strings.ToLower(word)] = value
				}
				s = after
				continue
			}
			all = append(all, challenge{strings.ToLower(word), map[string]string{}})
			s = rest
		}
	}
	return all
}

func skipList(s string) string { return strings.TrimLeft(s, " \t,") }

// token splits a token off the front of s.
func token(s string) (word, rest string) {
	i := strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r)
	})
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

// parameter reads `= value`, where value is a token or a quoted string.
func parameter(s string) (value, rest string, ok bool) {
	s, ok = strings.CutPrefix(strings.TrimLeft(s, " \t"), "=")
	if !ok {
		return "", "", false
	}
	s = strings.TrimLeft(s, " \t")
	if !strings.HasPrefix(s, `"`) {
		// Lenient: tokens here often hold what a token may not, such as "/".
		i := strings.IndexAny(s, " \t,")
		if i < 0 {
			i = len(s)
		}
		return s[:i], s[i:], true
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:], true
		case '\\':
			if i++; i == len(s) {
				return b.String(), "", true
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), "", true
}
