package config

import "fmt"

// Unsupported returns, in the file's order, what c asks for that is part of the configuration's contract but not built
// in this version of Fairlead. Each is an [*Error]. A daemon refuses to start, or to reload, while there is any.
func (c *Config) Unsupported() []error {
	var errs Errors
	lacks := func(field, problem, remedy string) { errs = append(errs, c.Refuse(field, problem, remedy)) }
	if c.Dataplane.Mode == ModeUserspace {
		lacks("dataplane.mode", "mode userspace is not built yet in this version", "use auto or xdp")
	}
	for i := range c.Services {
		s, at := &c.Services[i], fmt.Sprintf("services[%d]", i)
		lacksHere := func(field, what, remedy string) {
			lacks(at+"."+field, fmt.Sprintf("service %s: %s is not built yet in this version", s.Name, what), remedy)
		}
		if s.ProxyProtocol != ProxyNone {
			lacksHere("proxy_protocol", "proxy_protocol "+s.ProxyProtocol.String(), "use none")
		}
		if s.Balance.Mode != BalanceHash {
			lacksHere("balance.mode", "balance mode "+s.Balance.Mode.String(), "use hash")
		}
	}
	if len(errs) == 0 {
		return nil
	}
	errs.sort()
	return errs.Unwrap()
}
