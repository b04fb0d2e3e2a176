package config

import (
	"errors"
	"regexp"
	"regexp/syntax"
	"unicode/utf8"
)

// expression compiles a regular expression, once for each text.
func (c *checker) expression(s string) (*regexp.Regexp, *complaint) {
	switch {
	case s == "":
		return nil, complain("write what must be there, or take the line out", "the expression is empty")
	case len(s) > maxExpression:
		return nil, complain("take a shorter one", "an expression of %d bytes is over the limit of %d", len(s), maxExpression)
	}
	if known := c.expressions[s]; known != nil {
		return known, nil
	}
	compiled, err := regexp.Compile(s)
	if err != nil {
		return nil, wrongExpression(s, err)
	}
	c.expressions[s] = compiled
	return compiled, nil
}

// wrongExpression says what is wrong in s, and where.
func wrongExpression(s string, err error) *complaint {
	const remedy = `correct it (RE2 syntax); a \ stands before a character that means itself`
	var wrong *syntax.Error
	if !errors.As(err, &wrong) {
		return complain(remedy, "%q is not a regular expression (%v)", s, err)
	}
	// It goes wrong after its longest right beginning. A group that is open there may yet be closed, unless that is what
	// is wrong.
	at := len(s) - 1
	for ; at > 0; at-- {
		var cut *syntax.Error
		_, err := syntax.Parse(s[:at], syntax.Perl)
		if err == nil || wrong.Code != syntax.ErrMissingParen && errors.As(err, &cut) && cut.Code == syntax.ErrMissingParen {
			break
		}
	}
	return complain(remedy, "%q is not a regular expression: %s at character %d", s, wrong.Code,
		utf8.RuneCountInString(s[:at])+1)
}
